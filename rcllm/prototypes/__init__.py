"""The semantic history pool: token prototypes that stand in for histories nobody has computed."""
