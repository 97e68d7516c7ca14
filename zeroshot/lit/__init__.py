# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A small LiT for photographs: a locked image tower and a text tower that learns to agree with it (Zhai et al., 2022).

`photos` reads the photographs, `tower` loads the image tower, `features` runs it once over all photographs; `wordnet`
lists nouns and phrases, `teacher` embeds them with a sentence encoder, `text` teaches the small text tower; `names`
says what the photographs show, `vocabulary` turns that into targets, `projection` learns to place image features in the
space of the text; `measure` says how well that went, `checkpoint` writes the result.
"""
