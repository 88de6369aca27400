"""Score label maps and image-level labels against the truth."""
