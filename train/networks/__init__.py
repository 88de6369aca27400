"""Networks of our own: encoders of other libraries with the heads of papers."""
