"""The tiny models' own pretraining: glyphs, reading and matching, three tasks on the platform's step loop."""
