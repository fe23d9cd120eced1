"""Training: the loop, the commands that run it once or as a study, and the analysis of what came out."""
