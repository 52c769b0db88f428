#pragma once
#include <memory>
#include <string>

#include "trainer/models/families.h"

namespace corank {

class ConfigFile;

/// A model as its config.json describes it: read and checked, not yet built.
class Blueprint {
 public:
  virtual ~Blueprint() = default;
  /// ConfigError if what is split does not divide by `tensor` ranks.
  virtual void check_split(int tensor) const = 0;
  /// Throws if sequences of `positions` tokens are longer than the model can take; `origin` names its config.json.
  virtual void check_positions(const std::string& origin, int64_t positions) const = 0;
  /// Full name of the embedding, with .weight. A folder that has it without the first part is one of the bare model.
  virtual std::string embedding() const = 0;
  /// Collective over tp (nothing is sent). This rank's shards of the model. Reads from `weights` as long as the model
  /// lives.
  virtual std::unique_ptr<Model> build(const ModelOptions& options, std::shared_ptr<WeightSource> weights,
                                       Communicator& tp) const = 0;
};

/// A line of the table: what makes the family's models from a config.json, and which modules they have.
struct Family {
  const char* model_type;
  std::unique_ptr<Blueprint> (*read)(const ConfigFile& file);
  FamilyModules (*modules)();
};

// The table's entries, one file each: they read config.json and refuse what they cannot honour.
std::unique_ptr<Blueprint> read_llama(const ConfigFile& file);
std::unique_ptr<Blueprint> read_qwen2(const ConfigFile& file);
std::unique_ptr<Blueprint> read_qwen3(const ConfigFile& file);
std::unique_ptr<Blueprint> read_mistral(const ConfigFile& file);
std::unique_ptr<Blueprint> read_phi3(const ConfigFile& file);
std::unique_ptr<Blueprint> read_gpt2(const ConfigFile& file);
FamilyModules llama_modules();
FamilyModules qwen3_modules();
FamilyModules phi3_modules();
FamilyModules gpt2_modules();

}  // namespace corank
