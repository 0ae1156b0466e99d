"""Other libraries on top of seqkernels, one module for each; importing it imports that library."""
