"""Full-size comparisons with the official implementations."""
