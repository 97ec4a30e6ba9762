"""What the embedded model `nano` is made of: its pictures, its questions, its vocabulary and its files.

`pictures` draws, `questions` asks and answers, `chat` turns conversations into token ids and batches, `evaluation`
judges a network, `publish` writes the published file layout. ``train_nano.py`` and ``evaluate_nano.py`` use them.
"""
