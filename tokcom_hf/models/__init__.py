"""Model files that travel to the Hub: flat, importing only torch, transformers and their siblings."""
