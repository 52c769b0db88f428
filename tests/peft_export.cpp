// peft_export MODEL_DIR OUT_DIR [METHOD [SAVED...]]: trains three steps on fixed tokens, writes OUT_DIR/adapter (PEFT
// folder), OUT_DIR/merged (model folder) and OUT_DIR/logits.safetensors for tests/golden/check_peft.py. SAVED:
// modules_to_save.
#include <fmt/format.h>

#include "data/safetensors.h"
#include "data/storage.h"
#include "tests/support.h"
#include "trainer/files/adapter_file.h"
#include "trainer/files/merge.h"
#include "trainer/methods/rank_budget.h"
#include "trainer/run/checkpoint.h"
#include "trainer/run/generation.h"

int main(int argc, char** argv) {
  using namespace corank;
  if (argc < 3) return 64;
  ModelOptions options;
  options.path = argv[1];
  options.dtype = at::kFloat;
  options.max_positions = 64;
  AdapterConfig config;
  if (argc > 3) config.method = argv[3];
  for (int i = 4; i < argc; ++i) config.modules_to_save.emplace_back(argv[i]);
  AdaLoraConfig& budget = config.options.edit<AdaLoraConfig>();
  budget.init_r = 6;
  budget.target_r = 3;
  budget.total_step = 3;
  if (config.method != "adalora") {
    config.use_rslora = true;
    config.rank_pattern = {{"q_proj", 4}, {"layers.1.mlp.down_proj", 6}};
    config.alpha_pattern = {{"v_proj", 7}};
  }
  test::TrainingRun run(nullptr, 1, options, config);
  const at::Tensor tokens = at::arange(3, 27, at::TensorOptions(at::kInt)) * 4 % 61;
  StepBatches batches;
  batches.micro_batches = {make_batch({{{tokens, at::ones({24}, at::TensorOptions(at::kByte))}}}, 0, 64)};
  batches.num_targets = batches.micro_batches[0].num_targets();
  batches.num_tokens = 24;
  for (int64_t step = 1; step <= 3; ++step) run.step(batches, step, 1e-2);
  config.fan_in_fan_out = !transposed_weights(*run.model).empty();
  const std::string out = argv[2];
  DiskStorage disk;
  write_peft_folder(disk, out + "/adapter",
                    collect_adapter(run.store, *run.method, {"", config, argv[1]}, run.mesh.tp()));
  disk.make_folders(out + "/merged");
  write_merged_model(disk, out + "/merged", options, read_adapter(out + "/adapter"), /*dequantize=*/false);
  const at::Tensor ids = tokens.to(at::kLong);
  const at::Tensor logits =
      all_logits(*run.model, {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + 24}, run.mesh.tp());
  disk.write_file(out + "/logits.safetensors", safetensors_image({{"tokens", ids}, {"logits", logits}}));
  return 0;
}
