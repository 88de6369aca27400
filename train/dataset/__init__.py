"""What is trained on: the images of a label store or of a folder of masks, and the canvases that hold them."""
