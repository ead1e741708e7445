"""A cluster of engines on Ray Serve. The one room that imports ray, and in it the modules that say so."""
