"""LoRA: the adapter is trained under contexts that the adapted model makes. Give it 4 or 8 bits, and it is QLoRA.

Run: python examples/lora.py [--model NAME_OR_FOLDER] [--bits 8] [--max-steps N]
8 bits are optimum-quanto's, which runs on a CPU; 4 bits are bitsandbytes' NF4.
"""

import argparse
from itertools import permutations

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig

from selfgen import BSSConfig, BSSTrainer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--bits", type=int, choices=(4, 8, 32), default=32)
parser.add_argument("--max-steps", type=int, default=5)
parser.add_argument("--output-dir", default="outputs/lora")
options = parser.parse_args()

quantized = {
    4: lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    8: lambda: QuantoConfig("int8"),
}
how = {"quantization_config": quantized[options.bits]()} if options.bits in quantized else {}
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **how)
model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
model.print_trainable_parameters()

words = permutations(["one", "two", "three", "four", "five"], 4)
rows = Dataset.from_list(
    [{"prompt": f"Backwards: {' '.join(row)}", "completion": " ".join(reversed(row))} for row in words]
)
config = BSSConfig(
    options.output_dir, self_prob=0.25, max_steps=options.max_steps, learning_rate=1e-3, logging_steps=1, report_to=[]
)
tokenizer = AutoTokenizer.from_pretrained(options.model)
trainer = BSSTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model()  # the adapter alone
