# Cityscapes: 2,975 / 500 images, 19 classes, never seen in pretraining, 80k iterations, batch 8 in total.
_base_ = ["./_deeplabv3.py"]

crop_size = (512, 1024)
scale = (2048, 1024)
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
    batch_size=8,
    num_workers=4,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="MDPDataset", name="cityscapes", split="train", data_root="data", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="MDPDataset", name="cityscapes", split="val", data_root="data", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

model = dict(data_preprocessor=dict(size=crop_size), decode_head=dict(num_classes=19))
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
# The set in mdp.datasets whose tree is checked before the start, and its splits.
data = dict(name="cityscapes", train="train", val="val")
