"""End-to-end fine-tuning: CLIP and AST in the loop, from the cached pixels and log-Mel; no media is decoded."""
