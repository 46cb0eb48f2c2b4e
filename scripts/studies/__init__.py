"""Studies: what a file of a study asks for (plan), and how its runs are done (execute). The files of this folder are read by study.py."""
