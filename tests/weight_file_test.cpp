#include "data/weight_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <set>

#include "configs/error.h"
#include "data/file.h"
#include "data/storage.h"

namespace corank {
namespace {

class Weights : public testing::Test {
 protected:
  void SetUp() override { DiskStorage().make_folders(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write(const std::string& name, const std::string& bytes) {
    DiskStorage().write_file(folder_ + "/" + name, bytes);
  }
  void write_shards() {
    write("model-1.safetensors", safetensors_image({{"a", a_}, {"b", b_}}));
    write("model-2.safetensors", safetensors_image({{"c", c_}}));
  }
  void write_index(const std::string& map) { write("model.safetensors.index.json", "{\"weight_map\":{" + map + "}}"); }
  /// Must be refused with exit code 65 and `part`.
  void expect_refused(const std::string& part) {
    try {
      const WeightFile file(folder_);
      ADD_FAILURE() << "accepted, expected: " << part;
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  }
  const std::string folder_ = testing::TempDir() + "corank_weights_" + std::to_string(getpid());
  const std::string good_map_ = R"("a":"model-1.safetensors","b":"model-1.safetensors","c":"model-2.safetensors")";
  const at::Tensor a_ = at::arange(12, at::kFloat).view({3, 4}), b_ = at::ones({2}), c_ = at::full({5}, 3.0f);
};

TEST_F(Weights, SingleFile) {
  write("model.safetensors", safetensors_image({{"a", a_}, {"b", b_}}));
  WeightFile file(folder_);
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(file.has("a"));
  EXPECT_FALSE(file.has("z"));
  EXPECT_EQ(file.info("a").shape, (std::vector<int64_t>{3, 4}));
  EXPECT_TRUE(at::equal(file.read_slice("a", 1, 1, 2), a_.narrow(1, 1, 2)));
  EXPECT_EQ(file.bytes_read(), 3 * 2 * 4);
  EXPECT_EQ(file.folder(), folder_);
}

TEST_F(Weights, Shards) {
  write_shards();
  write_index(good_map_);
  WeightFile file(folder_);
  EXPECT_EQ(file.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_TRUE(at::equal(file.read("a"), a_));
  EXPECT_TRUE(at::equal(file.read("c"), c_));
  EXPECT_EQ(file.bytes_read(), 12 * 4 + 5 * 4);
}

TEST_F(Weights, UnusedTensorsAreNamed) {
  write_shards();
  write_index(good_map_);
  WeightFile file(folder_);
  file.read("a");
  file.info("b");
  try {
    file.require_all_used();
    ADD_FAILURE() << "unused weights went unseen";
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("2 tensors have no place in the model of its config.json: b, c."),
              std::string::npos)
        << error.what();
  }
  file.read_slice("b", 0, 0, 1);
  file.mark_used("c");
  file.require_all_used();
}

TEST_F(Weights, UnknownTensor) {
  write("model.safetensors", safetensors_image({{"a", a_}}));
  WeightFile file(folder_);
  EXPECT_THROW(file.read("z"), InputError);
  EXPECT_THROW(file.info("z"), InputError);
  EXPECT_THROW(file.read_slice("z", 0, 0, 1), InputError);
}

TEST_F(Weights, MissingFiles) {
  EXPECT_THROW(WeightFile(folder_ + "/absent"), MissingError);
  EXPECT_THROW(WeightFile{folder_}, MissingError);
  write("model-1.safetensors", safetensors_image({{"a", a_}, {"b", b_}}));
  write_index(good_map_);
  EXPECT_THROW(WeightFile{folder_}, MissingError);
}

TEST_F(Weights, IndexAndShardsMustAgree) {
  write_shards();
  write_index(R"("a":"model-1.safetensors","b":"model-2.safetensors","c":"model-2.safetensors")");
  expect_refused("tensor \"b\" is in model-2.safetensors, which does not hold it");
  write_index(R"("a":"model-1.safetensors","c":"model-2.safetensors")");
  expect_refused("model-1.safetensors: holds tensor b, which model.safetensors.index.json does not name");
  write_index(good_map_ + R"(,"d":"model-2.safetensors")");
  expect_refused("tensor \"d\"");
  write("model-2.safetensors", safetensors_image({{"c", c_}, {"a", a_}}));
  write_index(good_map_);
  expect_refused("holds tensor a, which model.safetensors.index.json places in another file");
}

TEST_F(Weights, HostileIndex) {
  write_shards();
  for (const char* shard : {"../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "", ".safetensors",
                            "..safetensors", "a\\u0000.safetensors", "a\\u0000/../x.safetensors"}) {
    write_index("\"a\":\"" + std::string(shard) + "\"");
    expect_refused("only names of .safetensors files");
  }
  write_index("\"a\":3");
  expect_refused("only names of .safetensors files");
  write_index(good_map_ + R"(,"a":"model-2.safetensors")");
  expect_refused("stands twice");
  write("model.safetensors.index.json", "{}");
  expect_refused("no weight_map");
  write("model.safetensors.index.json", "[]");
  expect_refused("no weight_map");
  write("model.safetensors.index.json", "{\"weight_map\":");
  expect_refused("not valid JSON");
  write("model.safetensors.index.json", "\xef\xbb\xbf{\"weight_map\":{}}");
  expect_refused("byte order mark");
}

TEST_F(Weights, BothKindsAtOnce) {
  write_shards();
  write_index(good_map_);
  write("model.safetensors", safetensors_image({{"a", a_}}));
  expect_refused("holds both");
}

class Companions : public Weights {
 protected:
  void SetUp() override {
    Weights::SetUp();
    DiskStorage().make_folders(to_);
  }
  std::set<std::string> copied(const std::string& from) {
    DiskStorage disk;
    copy_companions(disk, from, to_);
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(to_)) names.insert(entry.path().filename());
    return names;
  }
  const std::string to_ = folder_ + "/to";
};

TEST_F(Companions, WeightsConfigurationsAndWhatIsNoFileStayBehind) {
  for (const char* name : {"tokenizer.json", "LICENSE", "config.json", "adapter_config.json", "x.bin", "y.gguf"}) {
    write(name, "text of " + std::string(name));
  }
  ASSERT_EQ(::mkfifo((folder_ + "/pipe.json").c_str(), 0600), 0);
  write("large.txt", std::string((size_t{3} << 20) + 7, 'x'));
  EXPECT_EQ(copied(folder_), (std::set<std::string>{"tokenizer.json", "LICENSE", "large.txt"}));
  EXPECT_EQ(read_file(to_ + "/large.txt"), read_file(folder_ + "/large.txt"));
}

TEST_F(Companions, LinksLeadOnlyIntoTheFolderOrItsCache) {
  namespace fs = std::filesystem;
  const std::string model = folder_ + "/models--x", snapshot = model + "/snapshots/1";
  DiskStorage().make_folders(model + "/blobs");
  DiskStorage().make_folders(snapshot);
  write("secret", "s");
  write("models--x/blobs/abc", "tokens");
  write("models--x/snapshots/1/real.txt", "r");
  fs::create_symlink("../../blobs/abc", snapshot + "/tokenizer.json");
  fs::create_symlink("real.txt", snapshot + "/link.txt");
  fs::create_symlink(folder_ + "/secret", snapshot + "/secret.json");
  fs::create_symlink("../../../secret", snapshot + "/other.json");
  fs::create_symlink("nowhere", snapshot + "/dangling.json");
  fs::create_symlink("/dev/zero", snapshot + "/endless.json");
  EXPECT_EQ(copied(snapshot), (std::set<std::string>{"tokenizer.json", "real.txt", "link.txt"}));
  EXPECT_EQ(read_file(to_ + "/tokenizer.json"), "tokens");
  EXPECT_FALSE(fs::is_symlink(to_ + "/tokenizer.json"));
}

TEST_F(Companions, BlobsBesideAnOrdinaryFolderAreNoCache) {
  DiskStorage().make_folders(folder_ + "/a/mine/x");
  DiskStorage().make_folders(folder_ + "/a/blobs");
  write("a/blobs/abc", "tokens");
  std::filesystem::create_symlink("../../blobs/abc", folder_ + "/a/mine/x/tokenizer.json");
  EXPECT_EQ(copied(folder_ + "/a/mine/x"), std::set<std::string>());
}

}  // namespace
}  // namespace corank
