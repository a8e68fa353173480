"""What runs have written, as files for use elsewhere: a corpus of study documents, and SEAL's layouts."""
