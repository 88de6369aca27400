"""Commands that learn settings from labeled photographs."""
