"""Models and bundles on the Hugging Face Hub: references, downloads into its cache, uploads.

Only the command line imports this folder: it turns a reference into the path of a local folder, and
everything below works with that path. `huggingface_hub` is imported when a reference is used.
"""
