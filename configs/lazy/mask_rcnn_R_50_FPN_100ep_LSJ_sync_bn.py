"""Mask R-CNN R-50-FPN from scratch, as detectron2's new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.

100 epochs with large-scale jittering (arXiv:2012.07177) and SyncBN; written for any version of
detectron2, and with norms by name, so that the config.yaml of a run can be read again.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ws_detectron.model_zoo import get_stock_lazy_config

model = get_stock_lazy_config("common/models/mask_rcnn_fpn.py").model
dataloader = get_stock_lazy_config("common/data/coco.py").dataloader
optimizer = get_stock_lazy_config("common/optim.py").SGD
train = get_stock_lazy_config("common/train.py").train

model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = "SyncBN"
model.backbone.bottom_up.stages.norm = "SyncBN"
model.backbone.norm = "SyncBN"
model.proposal_generator.head.conv_dims = [-1, -1]  # two convs as wide as their input
_heads = model.roi_heads
_heads.box_head.update(
    input_shape=L(ShapeSpec)(channels=256, height=7, width=7),
    conv_dims=[256, 256, 256, 256],
    fc_dims=[1024],
    conv_norm="naiveSyncBN_N",  # torch's SyncBN refuses the empty input of a head without boxes
)
_heads.box_predictor.input_shape = L(ShapeSpec)(channels=1024)
_heads.mask_head.update(
    input_shape=L(ShapeSpec)(channels=256, height=14, width=14), conv_norm="naiveSyncBN_N"
)

dataloader.train.mapper.augmentations = [
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
    L(T.FixedSizeCrop)(crop_size=[1024, 1024]),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.train.mapper.recompute_boxes = True  # of masks that the crop has cut
dataloader.train.total_batch_size = 64

train.init_checkpoint = ""
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = 100 * 118_000 // 64  # epochs x images / batch

optimizer.lr = 0.1
optimizer.weight_decay = 4e-5
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01],
        milestones=[163_889, 177_546],  # 8/9 and 26/27 of the iterations
        num_updates=train.max_iter,
    ),
    warmup_length=500 / train.max_iter,
    warmup_factor=0.067,
)
