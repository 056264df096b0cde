"""What is done with networks: options, data, training, analysis, figures. Imports point one way, in that order."""
