"""Reading pixels: JPEG files decoded directly, and arrays as Pillow images."""
