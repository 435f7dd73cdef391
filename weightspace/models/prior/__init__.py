"""Prior of weights given datasets and results: what samples latents that the autoencoder decodes."""
