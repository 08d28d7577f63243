# LabelMeFacade: the official 100 training images; validation on 200 official test images that pretraining never sees.
# A narrow ResNet-18 on two CPU cores; the flags of mdp.finetune scale it up.
_base_ = ["./_deeplabv3.py"]

crop_size = (96, 96)
scale = (1024, 180)
train_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LoadLabels"),
    dict(type="RandomResize", scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
# The label is loaded after Resize: predictions are scored at the original size.
test_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="Resize", scale=scale, keep_ratio=True),
    dict(type="LoadLabels"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="MDPDataset", name="labelmefacade", split="train", data_root="data", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="MDPDataset", name="labelmefacade", split="holdout", data_root="data", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(depth=18, base_channels=16, stem_channels=16),
    decode_head=dict(in_channels=128, channels=64, dilations=(1, 3, 6), num_classes=8),
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=300, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300, val_interval=30)
default_hooks = dict(checkpoint=dict(interval=30))
# Validations: the early one (a tenth of the schedule) and the last one only.
validate = "ends"
# The set in mdp.datasets whose tree is checked before the start, and its splits.
data = dict(name="labelmefacade", train="train", val="holdout")
