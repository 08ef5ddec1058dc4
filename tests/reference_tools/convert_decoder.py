"""llama.cpp's convert_hf_to_gguf.py, told what the tokenizer is; run by the reference environment.

    python convert_decoder.py LLAMA_CPP ARGUMENTS ...

The script knows tokenizers by a hash over a text's ids, and refuses vocabularies that it has not been told of, as
small ones made for tests. All of them here are byte-level BPE with the split pattern of Qwen2.
"""

import runpy
import sys

llama_cpp = sys.argv[1]
sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
sys.argv = [f"{llama_cpp}/convert_hf_to_gguf.py", *sys.argv[2:]]

from conversion import base  # noqa: E402 - found in the folder given

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(sys.argv[0], run_name="__main__")
