#pragma once
#include <memory>
#include <string>
#include <vector>

#include "trainer/layers/model.h"
#include "trainer/weights/residency.h"
#include "trainer/weights/weight_source.h"

namespace corank {

enum class Checkpointing {
  none,  ///< keep everything that backward needs
  mlp,   ///< recompute the feed-forward half of each layer in backward
  full,  ///< recompute each layer
};

struct ModelOptions {
  std::string path;   ///< Hugging Face folder; or
  std::string shape;  ///< random weights of a named shape
  at::ScalarType dtype = at::kBFloat16;
  std::string quantization = "none";
  bool double_quant = true;  ///< of nf4
  Checkpointing checkpointing = Checkpointing::none;
  int64_t max_positions = 1024;  ///< longest sequence that will come
  uint64_t seed = 42;            ///< of random weights
  at::Device device = at::kCPU;
  std::shared_ptr<Residency> residency = resident();  ///< where the blocks' linears are
};

/// config.json of `options`, or the JSON of the named shape.
std::string model_config_json(const ModelOptions& options);
std::vector<std::string> shape_names();

/// Names of modules in every family, by which an adapter's file is judged without its model.
struct FamilyModules {
  std::vector<std::string> embeddings, heads;  ///< the last parts
  std::vector<std::string> others;             ///< all that take no adapter; those of a layer as of the first one
};
FamilyModules family_modules();

/// What must divide for `tensor` ranks, and everything else of config.json that can be refused without reading weights:
/// ConfigError (sizes that do not divide) or InputError (an unknown architecture or attribute).
void check_model_config(const std::string& config_json, const std::string& origin, int tensor);

/// Collective over tp (nothing is sent, all ranks call it). Reads config.json, picks the family by `model_type`, loads
/// this rank's shards. A head in the files that is not the embedding is the model's, whatever tie_word_embeddings says.
/// InputError for missing, unused or misshapen tensors, for integer ones, and for values that are not finite.
std::unique_ptr<Model> load_model(const ModelOptions& options, Communicator& tp);

/// The model without its numbers (tensors of the meta device): the same checks of names and shapes, from headers alone.
std::unique_ptr<Model> outline_model(ModelOptions options, Communicator& tp);

/// The blocks' linears of a Hugging Face folder, read one at a time, for programs that need no forward pass.
class LinearReader {
 public:
  /// Reads headers only. Refuses what load_model refuses.
  explicit LinearReader(const std::string& folder);
  /// The model without its numbers.
  Model& outline() { return *outline_; }
  /// Weight [out, in] of the linear, float32 on the CPU; nf4 dequantised. InputError if the model has none of this
  /// name.
  at::Tensor read(const std::string& module);

 private:
  std::string folder_;
  std::unique_ptr<Model> outline_;
  std::unique_ptr<WeightSource> source_;
};

}  // namespace corank
