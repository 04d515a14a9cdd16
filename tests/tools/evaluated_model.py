"""The model and the data set of the evaluation tools' tests."""

QUICKSTART = "quickstart/mask_rcnn_R_18_FPN_shapes_gn_ws.yaml"
# A model of COCO's classes at 64 pixels that finds a few things at once, on the CPU.
OPTIONS = """
MODEL.ROI_HEADS.NUM_CLASSES 80 MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 MODEL.DEVICE cpu
MODEL.RPN.POST_NMS_TOPK_TEST 10 TEST.DETECTIONS_PER_IMAGE 8
INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
DATASETS.TEST ('coco_2017_val',) TEST.EXPECTED_RESULTS []
""".split()

# the name of the data set where `coco_2017_val` is another one
IN_PROCESS = "evaluation_files_val"
