"""What is done with networks: options, data, training, analysis, figures; imports point back along this."""
