# An own set, `python -m mdp.finetune --datasets NAME=FOLDER`: classes and splits are the folder's. The network is the
# checkpoint's; without one a ResNet-50. --crop-size, --short-side, --batch-size, --iters, --lr of mdp.finetune.
_base_ = ["./_deeplabv3.py"]

crop_size = (224, 224)
scale = (1024, 256)
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
    dataset=dict(type="MDPDataset", name="", split="train", data_root="data", pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="MDPDataset", name="", split="val", data_root="data", pipeline=test_pipeline),
)
test_dataloader = val_dataloader

model = dict(data_preprocessor=dict(size=crop_size))
param_scheduler = [dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=0, end=4000, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=4000, val_interval=400)
default_hooks = dict(checkpoint=dict(interval=400))
# --datasets gives the name.
data = dict(name="", train="train", val="val")
