import runpy

runpy.run_module("src.trainer.simple_ablation_analysis", run_name="__main__")
