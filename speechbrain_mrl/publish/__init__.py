"""Models as folders, on the Hub, and back."""
