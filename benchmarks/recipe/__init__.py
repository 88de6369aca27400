"""The whole method on VOC, COCO or drawn scenes, with the table of results."""
