"""Model and data of quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml as a LazyConfig, on the CPU.

`with_ws` converts the built model, whose keys are therefore those of `model.module`.
"""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from ws_detectron import with_ws
from ws_detectron.model_zoo import get_stock_lazy_config

model = get_stock_lazy_config("common/models/mask_rcnn_fpn.py").model
dataloader = get_stock_lazy_config("common/data/coco.py").dataloader
optimizer = get_stock_lazy_config("common/optim.py").SGD
train = get_stock_lazy_config("common/train.py").train

# scenes are 8-bit noise around mid-grey
model.pixel_mean, model.pixel_std = [127.5, 127.5, 127.5], [64.0, 64.0, 64.0]
model.backbone.bottom_up.stem.norm = "GN"
model.backbone.bottom_up.stages = L(ResNet.make_default_stages)(depth=18, norm="GN")
model.backbone.update(out_channels=64, norm="GN")
_rpn = model.proposal_generator
_rpn.update(
    in_features=["p2", "p3", "p4"],
    batch_size_per_image=64,
    pre_nms_topk=[150, 200],  # training, inference
    post_nms_topk=[60, 80],
)
_rpn.head.in_channels = 64
# objects are 28 to 64 pixels wide
_rpn.anchor_generator.update(sizes=[[24], [40], [64]], strides=[4, 8, 16])
_heads = model.roi_heads
_heads.num_classes = 6
_heads.batch_size_per_image = 32
_heads.box_pooler.sampling_ratio = _heads.mask_pooler.sampling_ratio = 2
_heads.box_head.update(
    input_shape=L(ShapeSpec)(channels=64, height=7, width=7),
    conv_dims=[64, 64],
    fc_dims=[256],
    conv_norm="GN",
)
# one box and one mask per proposal, not one per class: each class trains those of all
_heads.box_predictor.update(
    input_shape=L(ShapeSpec)(channels=256),
    cls_agnostic_bbox_reg=True,
    loss_weight={"loss_box_reg": 0.5},
)
_heads.mask_head.update(
    input_shape=L(ShapeSpec)(channels=64, height=14, width=14),
    num_classes=1,
    conv_dims=[64, 64, 64],  # the last one is the deconvolution's
    conv_norm="GN",
)
model = L(with_ws)(module=model)

dataloader.train.dataset.names = "scenes_shapes_128_train"
dataloader.test.dataset.names = "scenes_shapes_128_val"
# scenes are used in their own size, and their masks are exact to the pixel; polygons are not
dataloader.train.mapper.update(
    augmentations=[L(T.RandomFlip)(horizontal=True)], instance_mask_format="bitmask"
)
dataloader.test.mapper.augmentations = []
dataloader.train.update(total_batch_size=4, num_workers=1)
dataloader.test.num_workers = 1

train.init_checkpoint = ""
train.device = "cpu"
train.seed = 1
train.max_iter = train.eval_period = 840
train.checkpointer.period = 250

optimizer.lr = 0.02
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=50 / train.max_iter,
    warmup_factor=0.001,
)
