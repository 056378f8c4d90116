"""Between formats: which tensor becomes which, in what order files are written, and how it goes on when killed."""
