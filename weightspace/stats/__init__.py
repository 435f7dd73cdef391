"""Statistics on plain arrays: correlation, resampling, clustering, variance, geometry, retrieval."""
