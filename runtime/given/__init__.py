"""Labels and boxes that the user already has, in common annotation formats."""
