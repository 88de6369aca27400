"""SAM 3: photographs and noun phrases to instances."""
