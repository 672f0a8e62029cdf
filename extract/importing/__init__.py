"""Features and targets made elsewhere become streams of a cache."""
