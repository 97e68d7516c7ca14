# Copyright 2026 The AlignZeg for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A small LiT for photographs: a locked image tower and a text tower aligned with it (Zhai et al., 2022).

`photos` reads the photographs, `tower` loads the image tower, `features` runs it once over all photographs. `wordnet`
lists nouns and phrases, `teacher` embeds them with a sentence encoder, `text` trains the small text tower. `names` names
the contents of photographs, `vocabulary` makes targets of these names, `projection` learns to project image features into
the text space. `measure` evaluates the result, `checkpoint` writes it.
"""
