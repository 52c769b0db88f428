#pragma once
#include <memory>
#include <string>

#include "trainer/run/observer.h"

namespace corank {

class Storage;

/// Appends one JSON object a logged step to `path`. What training begins after stays; later records, which it makes
/// again, are dropped first. Borrows the storage. StorageError.
std::unique_ptr<Observer> metrics_file(Storage& storage, const std::string& path);
/// The JSON object of one record.
std::string to_json(const StepRecord& record);

}  // namespace corank
