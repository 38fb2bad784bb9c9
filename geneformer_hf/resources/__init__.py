"""Facts that ship with the package; PROVENANCE.md says where they come from."""
