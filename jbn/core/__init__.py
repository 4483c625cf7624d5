"""How the public functions are done. Nothing here is public: names may change in any version."""
