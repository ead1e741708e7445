"""The one primitive: fresh tokens attend to a list of cached segments and to each other."""
