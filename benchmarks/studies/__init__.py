"""The scripts behind the numbers in the documentation; not in the wheel."""
