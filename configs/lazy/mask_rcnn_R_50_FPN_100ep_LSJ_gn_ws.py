"""mask_rcnn_R_50_FPN_100ep_LSJ_sync_bn with GN and WS in place of SyncBN, and nothing else changed.

`with_ws` converts the built model, whose keys are therefore those of `model.module`:
model.module.roi_heads.num_classes=20.
"""

from detectron2.config import LazyCall as L

from ws_detectron import with_ws

from .mask_rcnn_R_50_FPN_100ep_LSJ_sync_bn import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.backbone.bottom_up.stem.norm = "GN"
model.backbone.bottom_up.stages.norm = "GN"
model.backbone.norm = "GN"
model.roi_heads.box_head.conv_norm = "GN"
model.roi_heads.mask_head.conv_norm = "GN"
model = L(with_ws)(module=model)
