"""Labels and boxes that the user already has, in the formats people keep them in."""
