"""Quality of labels and of trained segmenters."""
