"""The whole method on VOC, COCO or drawn scenes, with a table of results."""
