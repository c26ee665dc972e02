"""The embedded world: freely licensed emoji drawings, their captions, and scenes made of them."""
