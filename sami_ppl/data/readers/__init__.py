"""Readers of files, one module for each family of formats; `sami_ppl.data.local` says which file is whose."""
