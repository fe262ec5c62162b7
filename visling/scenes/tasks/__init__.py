"""What downstream tasks ask about drawn scenes, each written in the official files of its benchmark."""
