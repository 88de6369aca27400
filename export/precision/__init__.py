"""Half precision: which nodes stay FP32, how they are found, and how the result is checked."""
